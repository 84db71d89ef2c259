"""From files as they lie about to documents."""
