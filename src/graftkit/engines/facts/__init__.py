"""What is known of each engine: one file each, with an ``ENGINE``, found by listing the folder."""
