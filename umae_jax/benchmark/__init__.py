"""Images per second, memory and compile time; side by side with PyTorch."""
