"""What is to be learnt, and how it is graded."""
