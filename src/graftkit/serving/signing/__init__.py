"""The parts of an adapter's record, from the live model that was trained."""
