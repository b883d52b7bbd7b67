-- Charge what was admitted to rate limits (GCRA): move theoretical arrival times on, whatever they are.
-- KEYS: one a subject, all of one hash tag.  ARGV: for each, microseconds to move on.
-- Returns for each how many microseconds its theoretical arrival time lies ahead of the server's clock.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local ahead = {}
for i, key in ipairs(KEYS) do
    local arrival = math.max(tonumber(redis.call('GET', key) or 0), now) + tonumber(ARGV[i])
    ahead[i] = arrival - now
    redis.call('SET', key, string.format('%.0f', arrival), 'PX', math.ceil(ahead[i] / 1000) + 1)
end
return ahead
