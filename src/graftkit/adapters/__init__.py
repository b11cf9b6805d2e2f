"""Adapters on disk: read safely, and brought into the form stock PEFT loads."""
