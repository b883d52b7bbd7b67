#!lua flags=no-writes
-- Count the heartbeats of the entries that lie in one shard's stream, a page at a time.
-- KEYS: stream.  ARGV: first id of the page, entries in a page.
-- Returns {sum of n, lines of entries without n, first id of the next page or ''}.
local page = redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
local heartbeats, external = 0, 0
for _, entry in ipairs(page) do
    local own, lines = false, 1
    for i = 1, #entry[2], 2 do
        if entry[2][i] == 'n' and entry[2][i + 1]:match('^%d+$') then
            own, heartbeats = true, heartbeats + tonumber(entry[2][i + 1])
        elseif entry[2][i] == 'data' then
            lines = 1 + select(2, entry[2][i + 1]:gsub('\n', ''))
        end
    end
    if not own then external = external + lines end
end
if #page < tonumber(ARGV[2]) then return {heartbeats, external, ''} end
return {heartbeats, external, '(' .. page[#page][1]}
