__version__ = "0.1.0"
# Of all JSON that graftkit writes; a new number means that a field was renamed or removed.
SCHEMA_VERSION = 1
