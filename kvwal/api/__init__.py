"""What a program opens and holds: `open` and `Store`."""
