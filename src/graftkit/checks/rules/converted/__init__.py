"""Rules on adapters that were converted for an engine."""
