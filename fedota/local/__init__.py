"""The platform on embedded servers: `fedota up`."""
