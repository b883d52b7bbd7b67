#!lua flags=no-writes
-- The id up to which every entry of one shard's stream was acknowledged and deleted.
-- KEYS: stream.
-- Returns {id of the oldest entry or '', last id that the stream ever gave or ''}.
if redis.call('EXISTS', KEYS[1]) == 0 then return {'', ''} end
local oldest = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)
if #oldest > 0 then return {oldest[1][1], ''} end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return {'', info[i + 1]} end
end
return {'', ''}
