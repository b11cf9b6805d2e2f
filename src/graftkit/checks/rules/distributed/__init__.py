"""What only shows on several devices."""
