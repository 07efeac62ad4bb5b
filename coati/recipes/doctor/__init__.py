"""``coati doctor``: what would keep a run from starting or going well on these hosts, with the
remedy of each."""
