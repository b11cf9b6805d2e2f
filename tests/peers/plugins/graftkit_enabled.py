"""A pytest plugin: the whole run happens under ``graftkit.enable()``."""

import graftkit

graftkit.enable()
