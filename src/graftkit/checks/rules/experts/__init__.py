"""Whether experts are adapted as meant, and layers that share their names."""
