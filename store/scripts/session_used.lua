-- A session is in use, whether or not anything is read from it or appended to it.
--
-- KEYS  see session_functions.lua
-- ARGV  1 member   2 ttl, ms
-- Answer  whether there is such a session
-- with: session_functions
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
keep(now_ms(), tonumber(ARGV[2]), ARGV[1])
return 1
