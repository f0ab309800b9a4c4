"""Training scripts for several processes, one for each way to start them."""
