"""The edge over real HTTP and by command line: what everybody gets, and what nobody can talk it into."""
