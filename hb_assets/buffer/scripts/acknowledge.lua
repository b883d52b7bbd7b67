#!lua flags=allow-oom
-- Acknowledge and delete entries of one shard and count them in its ledger; an entry that somebody
-- else has deleted before is not counted again. Has to work when Redis is full, to make it emptier.
-- KEYS: stream, ledger.  ARGV: group, then of each entry: id, n (-1 for a foreign entry), heartbeats
-- as the drain counted them, bytes of data.
-- Returns how many entries this call deleted.
-- First, since a script is not undone: entries must not go where the ledger can't be written.
redis.call('HLEN', KEYS[2])
local deleted, own, appended, acknowledged, bytes = 0, 0, 0, 0, 0
for i = 2, #ARGV, 4 do
    redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
    if redis.call('XDEL', KEYS[1], ARGV[i]) == 1 then
        deleted = deleted + 1
        local n = tonumber(ARGV[i + 1])
        -- An n that isn't what the drain counted is none of ours: believed, it would break the ledger.
        if n >= 0 and n == tonumber(ARGV[i + 2]) then
            own = own + 1
            acknowledged = acknowledged + n
            bytes = bytes + tonumber(ARGV[i + 3])
        else
            appended = appended + tonumber(ARGV[i + 2])
            acknowledged = acknowledged + tonumber(ARGV[i + 2])
        end
    end
end
if deleted > 0 then
    redis.call('HINCRBY', KEYS[2], 'appended', appended)
    redis.call('HINCRBY', KEYS[2], 'acknowledged', acknowledged)
    redis.call('HINCRBY', KEYS[2], 'acknowledged_bytes', bytes)
    redis.call('HINCRBY', KEYS[2], 'acknowledged_entries', own)
end
return deleted
