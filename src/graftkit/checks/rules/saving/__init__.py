"""What saving and merging keep of the base and of the adapter."""
