"""Every figure of the README has its script here. May import anything of prismserve; nothing imports it."""
