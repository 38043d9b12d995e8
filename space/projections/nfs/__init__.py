"""NFSv4.1 and NFSv4.2 over TCP (RFC 8881, RFC 7862, RFC 8276): a view over the file model."""
