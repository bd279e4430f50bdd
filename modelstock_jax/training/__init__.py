"""Training N models side by side and merging them on device."""
