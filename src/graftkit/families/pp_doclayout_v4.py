"""PP-DocLayoutV4: heads for every layer of its decoder, of which the last layer's are used."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="pp_doclayout_v4",
    model_types=("pp_doclayout_v4",),
    # Two layers would not tell whether the first layer's heads are unused, or those of all but the last.
    twin_overrides={"decoder_layers": 3},
)
