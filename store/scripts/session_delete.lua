-- Delete a session and its events. App and user state stay.
--
-- KEYS  see session_functions.lua
-- ARGV  1 member
-- Answer  1 when there was one, else 0
redis.call('ZREM', KEYS[6], ARGV[1])
redis.call('ZREM', KEYS[7], ARGV[1])
redis.call('ZREM', KEYS[8], ARGV[1])
local was = redis.call('EXISTS', KEYS[1])
redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3])
return was
