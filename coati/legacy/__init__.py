"""Names and flags of earlier generations; nobody meets them who does not look for them."""
