"""Payment providers against what their makers say of them: servers on this machine that check and sign as they do."""
