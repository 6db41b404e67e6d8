"""Live events over WebSockets and server-sent events, and requests that wait for the end of a job."""
