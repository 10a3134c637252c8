"""What followers in other processes share with the process that writes: pins, and what it tells them."""
