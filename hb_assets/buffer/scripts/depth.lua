#!lua flags=no-writes
-- One shard's state at one instant, without reading data to the client.
-- KEYS: stream, ledger.  ARGV: group.
-- Returns {entries, id of the oldest or '', pending, consumers, undelivered or -1, bytes of memory
-- that the stream takes if there are more entries in it than our own, milliseconds since each consumer with
-- pending entries was heard of, then of the ledger appended, acknowledged, appended_bytes,
-- acknowledged_bytes, appended_entries, acknowledged_entries, lost}.
local ledger = redis.call('HMGET', KEYS[2], 'appended', 'acknowledged', 'appended_bytes',
    'acknowledged_bytes', 'appended_entries', 'acknowledged_entries', 'lost')
for i = 1, 7 do ledger[i] = tonumber(ledger[i] or 0) end
local length, oldest, pending, consumers, undelivered = redis.call('XLEN', KEYS[1]), '', 0, 0, -1
local memory, idle = 0, {}
if length > 0 then oldest = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1][1] end
if length > ledger[5] - ledger[6] then
    -- Of many nodes: a flood needn't look like the few that are sampled when one doesn't ask.
    memory = redis.pcall('MEMORY', 'USAGE', KEYS[1], 'SAMPLES', 5000)
    if type(memory) ~= 'number' then memory = 0 end
end
if redis.call('EXISTS', KEYS[1]) == 1 then
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
        local info = {}
        for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
        if info['name'] == ARGV[1] then
            pending, consumers = info['pending'], info['consumers']
            if length == 0 then
                undelivered = 0
            elseif #redis.call('XRANGE', KEYS[1], '(' .. info['last-delivered-id'], '+', 'COUNT', 1) == 0 then
                undelivered = 0
            end
        end
    end
end
if pending > 0 then
    for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
        local info = {}
        for i = 1, #consumer, 2 do info[consumer[i]] = consumer[i + 1] end
        if info['pending'] > 0 then idle[#idle + 1] = info['idle'] end
    end
end
return {length, oldest, pending, consumers, undelivered, memory, idle, unpack(ledger)}
