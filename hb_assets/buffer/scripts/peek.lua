#!lua flags=no-writes
-- Entries that lie in one shard's stream, a page at a time; none is taken, claimed or delivered.
-- KEYS: stream, ledger.  ARGV: first id of the page, most entries, bytes of data after which a page
-- ends, '1' to leave out entries of our own appends.
-- Returns {first id of the next page or '', {{id, n or '', data or false}, ...}}.
if ARGV[4] == '1' then
    -- Where our own appends explain the stream's length, nothing else lies there: don't go through it.
    local ledger = redis.call('HMGET', KEYS[2], 'appended_entries', 'acknowledged_entries')
    local own = tonumber(ledger[1] or 0) - tonumber(ledger[2] or 0)
    if redis.call('XLEN', KEYS[1]) == own then return {'', {}} end
end
local page = redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
local found, bytes = {}, 0
for at, entry in ipairs(page) do
    local own, data = '', false
    for i = 1, #entry[2], 2 do
        if entry[2][i] == 'n' and entry[2][i + 1]:match('^%d+$') then
            own = entry[2][i + 1]
        elseif entry[2][i] == 'data' then
            data = entry[2][i + 1]
        end
    end
    if own == '' or ARGV[4] ~= '1' then
        found[#found + 1] = {entry[1], own, data}
        bytes = bytes + (data and #data or 0)
    end
    if bytes >= tonumber(ARGV[3]) and at < #page then return {'(' .. entry[1], found} end
end
if #page < tonumber(ARGV[2]) then return {'', found} end
return {'(' .. page[#page][1], found}
