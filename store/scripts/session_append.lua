-- Append one ADK event to a session: stream, session state, app and user state, all or nothing.
-- What it costs does not depend on how many events the session has.
--
-- KEYS  see session_functions.lua
-- ARGV  1 how the writer shows that its copy is not stale: "marker", "event", or "any" (it need not)
--       2 marker: incarnation/last entry   event: id of the last event of the copy, "" for none
--       3 event: last update time of the copy
--       4 event id   5 event, JSON   6 its timestamp   7 how many entries of that id are known to differ
--       8 ttl, ms   9 member   10, 11, 12 number of session, app and user fields, then: field, JSON, …
-- Answer  {"appended", incarnation, entry id, id of the entry before}
--         {"known", incarnation, entry id, JSON, …}   entries of that event id, for the caller to compare
--         {"stale"}   {"gone"}
-- with: session_functions
local head = redis.call('HMGET', KEYS[1], 'incarnation', 'last', 'at', 'event')
local incarnation, last = head[1], head[2]
if not incarnation then return {'gone'} end

local same = redis.call('HGET', KEYS[3], ARGV[4])
if same then
  local known = {'known', incarnation}
  for id in string.gmatch(same, '%S+') do
    known[#known + 1] = id
    known[#known + 1] = redis.call('XRANGE', KEYS[2], id, id)[1][2][2]
  end
  if #known - 2 ~= 2 * tonumber(ARGV[7]) then return known end
end

if ARGV[1] == 'marker' then
  if ARGV[2] ~= incarnation .. '/' .. last then return {'stale'} end
elseif ARGV[1] == 'event' then
  if tonumber(head[3]) > tonumber(ARGV[3]) and ARGV[2] ~= (head[4] or '') then return {'stale'} end
end

-- Time of Redis in front, the number of the event behind; the clock may go backwards, ids may not.
local now = now_ms()
local ms = math.max(now, tonumber(string.match(last, '^%d+')))
local id = string.format('%.0f-%d', ms, number_of(last) + 1)
redis.call('XADD', KEYS[2], id, 'e', ARGV[5], 't', ARGV[6])
redis.call('HSET', KEYS[3], ARGV[4], same and (same .. ' ' .. id) or id)
redis.call('HSET', KEYS[1], 'last', id, 'at', ARGV[6], 'event', ARGV[4])
redis.call('HINCRBY', KEYS[1], 'bytes', #ARGV[5])
local at = write(KEYS[1], 13, tonumber(ARGV[10]))
at = write(KEYS[4], at, tonumber(ARGV[11]))
write(KEYS[5], at, tonumber(ARGV[12]))
keep(now, tonumber(ARGV[8]), ARGV[9])
return {'appended', incarnation, id, last}
