"""HTTP requests on a client's behalf: to public addresses only, within bounds, each failure in a word."""
