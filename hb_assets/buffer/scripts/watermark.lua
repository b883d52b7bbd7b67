#!lua flags=no-writes
-- Where one shard's stream begins and ends, and the server's clock.
-- KEYS: stream.
-- Returns {id of the oldest entry or '', last id that the stream ever gave, epoch milliseconds}.
local now = redis.call('TIME')
local ms = now[1] .. string.format('%03d', math.floor(tonumber(now[2]) / 1000))
if redis.call('EXISTS', KEYS[1]) == 0 then return {'', '0-0', ms} end
local oldest, last = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1), '0-0'
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then last = info[i + 1] end
end
return {#oldest > 0 and oldest[1][1] or '', last, ms}
