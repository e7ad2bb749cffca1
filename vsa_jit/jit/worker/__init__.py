"""The program that compiles, in a process of its own."""
