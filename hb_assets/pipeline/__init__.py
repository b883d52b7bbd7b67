"""Work that needs both buffer and lake: drain, import, audit, erasure, maintenance, alarms."""
