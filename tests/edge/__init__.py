"""The edge over real HTTP and from the command line: what every route answers, and what none of them may be talked into."""
