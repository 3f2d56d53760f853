-- Read a session: its state, and of its events only what the reader lacks.
--
-- KEYS  see session_functions.lua
-- ARGV  1 incarnation that the reader knows   2 the last entry it has   3 number of the first it has
--       4 how many recent events are wanted, -1 for all   5 "1" when a time limits them too
--       6 ttl, ms   7 member   8 most entries   9 most bytes (about) in one answer
-- Answer  {session, app state, user state, how, entries}, or false: there is no such session
--         how: "more" after the last it has, "all" from the first on, "back" from the last backwards;
--         where the answer was too small for all, the reader goes on with XRANGE and XREVRANGE
-- with: session_functions
local head = redis.call('HMGET', KEYS[1], 'incarnation', 'last', 'bytes')
if not head[1] then return false end
keep(now_ms(), tonumber(ARGV[6]), ARGV[7])

local last, wanted = number_of(head[2]), tonumber(ARGV[4])
local page = tonumber(ARGV[8])
if last > 0 then
  page = math.max(1, math.min(page, math.floor(tonumber(ARGV[9]) * last / tonumber(head[3]))))
end

local how, entries = 'all', {}
local first = 1
if wanted >= 0 then first = math.max(1, last - wanted + 1) end
if ARGV[1] == head[1] and tonumber(ARGV[3]) <= first and number_of(ARGV[2]) >= first - 1 then
  how = 'more'
  if ARGV[2] ~= head[2] then
    entries = redis.call('XRANGE', KEYS[2], '(' .. ARGV[2], '+', 'COUNT', page)
  end
elseif wanted == 0 then
  how = 'back'
elseif wanted > 0 or ARGV[5] == '1' then
  how = 'back'
  if wanted > 0 then page = math.min(page, wanted) end
  if ARGV[5] == '1' then page = math.min(page, 64) end
  entries = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', page)
else
  entries = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', page)
end
return {redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[4]), redis.call('HGETALL', KEYS[5]),
  how, entries}
