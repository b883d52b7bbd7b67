-- Append entries to some shards; those of a section all or none, unless they would pass the bound.
-- One call for all shards of a server that isn't a cluster: a call costs more than what it does.
-- KEYS: of each section stream, ledger.  ARGV: most heartbeats, most bytes, then of each section the
-- caller's receipt (heartbeats that the ledger is known to have appended), how many entries follow,
-- and n and data of each.
-- Returns of each section {1, the server's clock in epoch milliseconds, heartbeats appended by now,
-- heartbeats that the ledger was set back by} when stored, or {0, heartbeats buffered, bytes buffered},
-- or the error that ended it (of this section alone: something else may lie at a shard's key).
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local most, most_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])

local function append(stream, key, receipt, first, last)
    local ledger = redis.call('HMGET', key,
        'appended', 'acknowledged', 'appended_bytes', 'acknowledged_bytes')
    for i = 1, 4 do ledger[i] = tonumber(ledger[i] or 0) end
    local buffered, buffered_bytes = ledger[1] - ledger[2], ledger[3] - ledger[4]

    local heartbeats, bytes = 0, 0
    for i = first, last, 2 do
        heartbeats = heartbeats + tonumber(ARGV[i])
        bytes = bytes + #ARGV[i + 1]
    end
    if buffered + heartbeats > most or buffered_bytes + bytes > most_bytes then
        return {0, buffered, buffered_bytes}
    end

    for i = first, last, 2 do
        redis.call('XADD', stream, '*', 'data', ARGV[i + 1], 'n', ARGV[i])
    end
    -- A ledger below the receipt was set back. What it lacks is no longer here: it counts on both
    -- sides, as what was drained does, and the audit misses in the lake whatever was not drained.
    local gone = math.max(0, receipt - ledger[1])
    if gone > 0 then redis.call('HINCRBY', key, 'acknowledged', gone) end
    local appended = redis.call('HINCRBY', key, 'appended', gone + heartbeats)
    redis.call('HINCRBY', key, 'appended_bytes', bytes)
    redis.call('HINCRBY', key, 'appended_entries', (last - first + 1) / 2)
    return {1, now, appended, gone}
end

local answers, at = {}, 3
for section = 1, #KEYS / 2 do
    local first, last = at + 2, at + 1 + 2 * tonumber(ARGV[at + 1])
    local stored, answer = pcall(append, KEYS[2 * section - 1], KEYS[2 * section],
        tonumber(ARGV[at]), first, last)
    if not stored then answer = {err = type(answer) == 'table' and answer.err or tostring(answer)} end
    answers[section], at = answer, last + 1
end
return answers
