#!lua flags=allow-oom
-- Find entries that were delivered, are not pending, and still lie in the stream (a group changed by
-- hand, a consumer deleted with its pending entries), and make them pending for one consumer.
-- KEYS: stream.  ARGV: group, heir, first id of the page, entries in a page.
-- Returns {entries that are the heir's now, first id of the next page or ''}.
local last = '0-0'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local info = {}
    for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
    if info['name'] == ARGV[1] then last = info['last-delivered-id'] end
end
local page = redis.call('XRANGE', KEYS[1], ARGV[3], last, 'COUNT', ARGV[4])
local claim = {'XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0}
for _, entry in ipairs(page) do
    if #redis.call('XPENDING', KEYS[1], ARGV[1], entry[1], entry[1], 1) == 0 then
        claim[#claim + 1] = entry[1]
    end
end
local found = #claim - 5
if found > 0 then
    claim[#claim + 1] = 'FORCE'
    claim[#claim + 1] = 'JUSTID'
    redis.call(unpack(claim))
end
if #page < tonumber(ARGV[4]) then return {found, ''} end
return {found, '(' .. page[#page][1]}
