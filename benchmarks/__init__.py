"""What the service costs, part by part; `tamiyo bench` measures the whole."""
