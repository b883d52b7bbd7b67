-- Post the bodies of a file in turn; say at the end, as one line of JSON, what came of it.
--   wrk ... -s post.lua URL -- BODIES CONTENT_TYPE [PAUSE_MS [API_KEY]]
-- BODIES: request bodies, each followed by byte 0x1e. PAUSE_MS: mean pause of a connection before
-- each request; 0: none. Requests are made once, so that making them takes no time from the server.

local requests = {}
local next_one = 0

function init(args)
  wrk.method = "POST"
  wrk.headers["Content-Type"] = args[2]
  if args[4] then wrk.headers["Authorization"] = "Bearer " .. args[4] end
  local file = assert(io.open(args[1], "rb"))
  for body in file:read("*a"):gmatch("([^\30]+)\30") do
    requests[#requests + 1] = wrk.format(nil, nil, nil, body)
  end
  file:close()
  local pause = tonumber(args[3] or "0")
  if pause > 0 then
    function delay() return math.random(0, 2 * pause) end
  end
end

function request()
  next_one = next_one % #requests + 1
  return requests[next_one]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "max_ms": %.3f, '
      .. '"refused": %d, "broken": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, latency.max / 1e3, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout))
end
