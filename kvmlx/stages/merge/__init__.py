"""What becomes of the rows that leave: one file a method."""
