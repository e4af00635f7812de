"""What is measured, how, and against whom: see README.md in this folder. `make bench-capture` runs it."""
