"""Rules that every adapter must keep, whatever it is trained on."""
