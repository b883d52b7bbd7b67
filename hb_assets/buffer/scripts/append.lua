-- Append entries to one shard, all or none, unless they would pass the buffer's bound.
-- KEYS: stream, ledger.  ARGV: most heartbeats, most bytes, the caller's receipt (heartbeats that
-- the ledger is known to have appended), then n and data of each entry.
-- Returns {1, the server's clock in epoch milliseconds, heartbeats appended by now, heartbeats that
-- the ledger was set back by} when stored, or {0, heartbeats buffered, bytes buffered}.
local time = redis.call('TIME')
local ledger = redis.call('HMGET', KEYS[2],
    'appended', 'acknowledged', 'appended_bytes', 'acknowledged_bytes')
for i = 1, 4 do ledger[i] = tonumber(ledger[i] or 0) end
local buffered, buffered_bytes = ledger[1] - ledger[2], ledger[3] - ledger[4]

local entries, heartbeats, bytes = (#ARGV - 3) / 2, 0, 0
for i = 4, #ARGV, 2 do
    heartbeats = heartbeats + tonumber(ARGV[i])
    bytes = bytes + #ARGV[i + 1]
end
if buffered + heartbeats > tonumber(ARGV[1]) or buffered_bytes + bytes > tonumber(ARGV[2]) then
    return {0, buffered, buffered_bytes}
end

for i = 4, #ARGV, 2 do
    redis.call('XADD', KEYS[1], '*', 'data', ARGV[i + 1], 'n', ARGV[i])
end
-- A ledger below the receipt was set back. What it lacks is no longer here: it counts on both sides,
-- as what was drained does, and the audit misses in the lake whatever of it was not drained.
local gone = math.max(0, tonumber(ARGV[3]) - ledger[1])
if gone > 0 then redis.call('HINCRBY', KEYS[2], 'acknowledged', gone) end
local appended = redis.call('HINCRBY', KEYS[2], 'appended', gone + heartbeats)
redis.call('HINCRBY', KEYS[2], 'appended_bytes', bytes)
redis.call('HINCRBY', KEYS[2], 'appended_entries', entries)
return {1, time[1] * 1000 + math.floor(time[2] / 1000), appended, gone}
