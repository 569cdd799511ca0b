"""A selector: holds clients until they are selected, hands models out, and sums the updates that come back."""
