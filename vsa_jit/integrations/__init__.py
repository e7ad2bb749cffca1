"""The programs that people run: each integration is imported only when it is asked for."""
