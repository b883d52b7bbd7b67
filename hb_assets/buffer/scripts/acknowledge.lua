#!lua flags=allow-oom
-- Acknowledge and delete entries of one shard and count them in its ledger; an entry that somebody
-- else has deleted before is not counted again. Has to work when Redis is full, to make it emptier.
-- KEYS: stream, ledger.  ARGV: group, then of each lot of entries that are alike: their n (-1 for
-- external ones), heartbeats that the drain counted in each, bytes of data of each, how many ids follow, the ids.
-- One command for a lot, however many: each costs more than what it does to an entry.
-- Returns how many entries this call deleted.
-- First, since a script is not undone: entries must not go where the ledger can't be written.
redis.call('HLEN', KEYS[2])
local deleted, own, appended, acknowledged, bytes, at = 0, 0, 0, 0, 0, 2
while at <= #ARGV do
    local n, heartbeats, size = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
    local first, last = at + 4, at + 3 + tonumber(ARGV[at + 3])
    redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, first, last))
    local gone = redis.call('XDEL', KEYS[1], unpack(ARGV, first, last))
    deleted = deleted + gone
    acknowledged = acknowledged + gone * heartbeats
    -- An n that isn't what the drain counted is none of ours: believed, it would break the ledger.
    if n == heartbeats then
        own = own + gone
        bytes = bytes + gone * size
    else
        appended = appended + gone * heartbeats
    end
    at = last + 1
end
if deleted > 0 then
    redis.call('HINCRBY', KEYS[2], 'appended', appended)
    redis.call('HINCRBY', KEYS[2], 'acknowledged', acknowledged)
    redis.call('HINCRBY', KEYS[2], 'acknowledged_bytes', bytes)
    redis.call('HINCRBY', KEYS[2], 'acknowledged_entries', own)
end
return deleted
