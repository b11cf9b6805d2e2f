"""Model -> map: every place an adapter can go, found from the model's own structure."""
