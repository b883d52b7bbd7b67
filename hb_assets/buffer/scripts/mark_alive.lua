#!lua flags=allow-oom
-- Set liveness timestamps to this server's clock, and add to the counts of work. Has to work
-- when Redis is full: a drain that makes it emptier is not dead.
-- KEYS: timestamps, counts.  ARGV: number of names, the names, then of each count: field, increment.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local seen, names = {}, tonumber(ARGV[1])
for i = 2, names + 1 do
    seen[#seen + 1] = ARGV[i]
    seen[#seen + 1] = now
end
if #seen > 0 then redis.call('HSET', KEYS[1], unpack(seen)) end
for i = names + 2, #ARGV, 2 do redis.call('HINCRBY', KEYS[2], ARGV[i], ARGV[i + 1]) end
return now
