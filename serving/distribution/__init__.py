"""A bundle handed to others: on a hub, as an OCI artifact, signed, with its bill of materials."""
